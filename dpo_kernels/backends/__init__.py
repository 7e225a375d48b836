"""The back ends. Each is one file that says all of it: where it runs, what it is capable of, what it computes."""
