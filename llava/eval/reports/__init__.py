"""Tables, intervals and pictures from answers, and the experiments that make the answers."""
