"""FLUX Fill: the pipeline with classifier-free guidance, loading it, and the sampler that every stage shares."""

from models.flux_fill.pipeline import FluxFillCFGPipeline

__all__ = ["FluxFillCFGPipeline"]
