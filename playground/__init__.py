"""Models and data in the layout of the original evaluation scripts."""
