"""The chain, in order: every stage and the ones that jobs start from."""

from __future__ import annotations

from assets.candidates import candidates
from assets.common import Stage
from assets.curated_dataset import curated_dataset
from assets.engine import engine
from assets.evaluation import evaluation
from assets.onnx import onnx
from assets.policy import policy
from assets.preference_pairs import preference_pairs
from assets.preferences import preferences
from assets.release import release
from assets.reward_model import reward_model
from assets.source_images import source_images

STAGES: tuple[Stage, ...] = (
    source_images,
    curated_dataset,
    candidates,
    preferences,
    preference_pairs,
    reward_model,
    policy,
    evaluation,
    onnx,
    engine,
    release,
)
PREFERENCES = preferences
POLICY = policy
RELEASE = release
