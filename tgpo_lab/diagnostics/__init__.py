"""What a pair is like: its card, whether the teacher is right where the student goes, the noise of a signal."""
