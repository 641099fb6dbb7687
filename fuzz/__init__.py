"""`make fuzz`: generated and mutated bytes against every parser that reads what others wrote, with other implementations
as judges where there are any."""
