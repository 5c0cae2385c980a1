"""Media and dialogues on disk to rows of frames and tokens."""
