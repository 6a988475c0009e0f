"""Our method on vLLM's Model Runner V2: trees stay on the device, and no step waits for them."""
