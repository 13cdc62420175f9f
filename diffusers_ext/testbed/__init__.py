"""The testbed: Fashion Scenes, its grader, the small base models and their training, and the demo."""
