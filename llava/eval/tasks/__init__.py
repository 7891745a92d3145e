"""What each benchmark is: its files, questions, prompt, score and place in the tables."""
