"""Published annotation formats read as rows of tools/preprocess_video.py, or as documents of tools/preprocess_text.py."""
