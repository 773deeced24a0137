"""The judge: Qwen2.5-VL as a pairwise reward model, its differentiable preprocessing and its losses."""

from models.judge.judge import Judge, Seen
from models.judge.loss import hinge_reward_loss, keep_loss, pair_loss
from models.judge.preprocess import preprocess
from models.judge.processor import JudgeProcessor
from models.judge.second import SecondJudge, Template

__all__ = ["Judge", "JudgeProcessor", "SecondJudge", "Seen", "Template", "hinge_reward_loss", "keep_loss", "pair_loss", "preprocess"]
