"""Class-conditional generation: the two objectives, and the samplers that read them."""
