"""Tables and plots of finished runs, and the paper's published numbers."""
