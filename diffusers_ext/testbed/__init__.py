"""The testbed: Fashion Scenes, its grader, the small base models and how they are trained, and the demo."""
