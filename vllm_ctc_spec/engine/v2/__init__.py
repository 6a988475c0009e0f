"""Our method on vLLM's Model Runner V2: trees stay on the device, and the host waits for none of them."""
