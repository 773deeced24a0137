"""Tokenizer and image processor of a Qwen2.5-VL folder, without its video half.

    processor = JudgeProcessor.from_pretrained("Qwen2.5-VL-7B-Instruct")
    processor.prompt("Is the first image better?")

`transformers.Qwen2_5_VLProcessor` refuses to be built without a video processor, and the only one there is needs torchvision, which this
project does not install. The two parts the judge needs are therefore loaded separately, from the same files in the hub's layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer, Qwen2VLImageProcessorPil

from models.errors import BrokenWeights, MissingWeights

FILES = ("preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class JudgeProcessor:
    """`tokenizer` carries the chat template; `image_processor` the resizing limits, means and patch sizes."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: Qwen2VLImageProcessorPil

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> JudgeProcessor:
        """Read a local folder in the layout of Qwen2.5-VL. Raises MissingWeights and BrokenWeights."""
        folder = Path(folder)
        if absent := [name for name in FILES if not (folder / name).exists()]:
            raise MissingWeights(f"{folder} has no {', '.join(absent)}.", "Download the whole Qwen2.5-VL folder, processor files included.")
        try:
            processor = cls(Qwen2Tokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder))
        except Exception as error:  # the Rust tokenizer raises bare Exception on a cut tokenizer.json
            raise BrokenWeights(f"The processor files in {folder} cannot be read: {error}.", "Download the folder again.") from error
        if processor.tokenizer.chat_template is None:
            raise BrokenWeights(f"{folder} has no chat template.", "Take tokenizer_config.json from the Instruct version of Qwen2.5-VL.")
        return processor

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def prompt(self, query: str, images: int = 2) -> str:
        """The chat text that puts `query` after the images and leaves the answer open. One pad token stands for each image."""
        harmless = query.replace("<|", "< |")  # a caption must not be able to add an image or close the turn
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": harmless}]
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text
