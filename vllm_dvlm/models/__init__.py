"""Model families in vLLM's layers: text backbone, vision, image processing."""
