"""Class-conditional generation: objectives, samplers, autoencoders and sample folders."""
