"""What every tool of `llava.eval` shares: files, command lines, tables."""
