"""What a network is, and what can be done to one: training, compression, inference, evaluation."""
