"""Arrays recorded from other implementations, each beside the script that made them."""
