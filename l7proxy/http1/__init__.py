"""HTTP/1.1 as a sans-IO core: strict heads, counted bodies, and the cycle of request and response between them."""
