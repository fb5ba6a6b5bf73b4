"""What a model answers, computed by transformers from nothing but its weights: an oracle that knows no cache."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


class Weights:
    """Versions of a model's weights in folders of their own, and what each of them answers."""

    def __init__(self, folder, like):
        self._folder, self._like = folder, like
        self._models, self._answers = {}, {}

    def make(self, version, folder=None):
        """Write a version; untied, as vLLM on CPU reloads no tied lm_head."""
        torch.manual_seed(version)
        config = Qwen2Config.from_pretrained(self._like, tie_word_embeddings=False)
        model = self._models[version] = Qwen2ForCausalLM(config).float().eval()
        folder = folder or self._folder / str(version)
        model.save_pretrained(folder)
        for file in self._like.glob("*token*"):
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    def check(self, version, prompt, answer):
        """Tokens equal and log-probabilities to 1e-5, computed by transformers from nothing but the weights."""
        key = version, tuple(prompt), len(answer.tokens)
        if key not in self._answers:
            self._answers[key] = self._compute(version, prompt, len(answer.tokens))
        expected = self._answers[key]
        assert answer.tokens == [f"token_id:{token}" for token, _ in expected]
        assert max(abs(a - b) for a, (_, b) in zip(answer.logprobs, expected, strict=True)) < 1e-5

    @torch.inference_mode()
    def _compute(self, version, prompt, count):
        model, ids, past, answer = self._models[version], torch.tensor([prompt]), None, []
        for _ in range(count):
            out = model(ids, past_key_values=past, use_cache=True)
            logprob, token = out.logits[0, -1].log_softmax(-1).max(-1)
            answer.append((int(token), float(logprob)))
            ids, past = token.view(1, 1), out.past_key_values
        return answer
