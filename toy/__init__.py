"""The toy world: scenes and their pictures, how people speak of them, and a grader."""
