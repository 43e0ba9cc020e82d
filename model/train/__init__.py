"""Training: packed data, the optimizer, one compiled step, and a loop that resumes bit for bit."""
