"""What a request costs with this package, with its alternatives and with the bare storage: run by ``make bench``."""
