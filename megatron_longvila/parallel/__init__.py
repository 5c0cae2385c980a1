"""Process groups, the MM-SP plan and the collectives with their adjoints."""
