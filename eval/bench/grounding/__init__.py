"""MedGLIP beside peers, on the same images, split, trunk and minutes of CPU: python -m eval.bench.grounding --help."""
