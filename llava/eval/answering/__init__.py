"""From a line of a question file to a line of the answer file."""
