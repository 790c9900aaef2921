"""People judge answers: who asks them, the queue that waits, what they say, how far they agree."""
