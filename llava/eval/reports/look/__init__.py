"""Looking at answers: runs side by side in one HTML file, and which answers differ."""
