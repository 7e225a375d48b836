"""What `dpo-kernels` does on the command line: a file a command, and what they share."""
