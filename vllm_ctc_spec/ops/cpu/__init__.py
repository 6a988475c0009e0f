"""Tree attention and the K/V move on a CPU, in C++ that is compiled when it is first needed."""
