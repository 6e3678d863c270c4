"""The tiny world: an addition task, two reasoning styles, and student/teacher pairs made from seeds.

Everything here produces ordinary Hugging Face checkpoints and prompt files: the training loop sees a pair like any
other and does not know that the world is tiny.
"""
