"""2D attention: all-to-all over heads (ulysses) times exchange of keys and values (ring), over packed samples."""
