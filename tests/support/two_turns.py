"""An agent loop for verl that asks the same question a second time, as a second turn of the conversation."""

from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput

AGAIN = {"role": "user", "content": "Are you sure? Check each step and write the final answer once more."}


class TwoTurns(AgentLoopBase):
    async def run(self, sampling_params, **kwargs):
        messages, request = list(kwargs["raw_prompt"]), uuid4().hex
        first = prompt = await self.ct_build_initial_tokens(messages)
        mask, logprobs = [], []
        for turn in range(2):
            answer = await self.server_manager.generate(
                request_id=request, prompt_ids=prompt, sampling_params={**sampling_params, "max_tokens": 24}
            )
            merged, mask, logprobs = await self.ct_merge_assistant_token(
                prompt, answer.token_ids, mask, logprobs, assistant_logprobs=answer.log_probs
            )
            prompt = merged.token_ids
            if turn == 0:
                messages.append({"role": "assistant", "content": self.tokenizer.decode(answer.token_ids)})
                merged, mask, logprobs = await self.ct_merge_context_msg(
                    messages, [*messages, AGAIN], prompt, mask, logprobs
                )
                prompt = merged.token_ids
        length = self.rollout_config.response_length
        return AgentLoopOutput(
            prompt_ids=first,
            response_ids=prompt[len(first) :][:length],
            response_mask=mask[:length],
            response_logprobs=logprobs[:length] if logprobs else None,
            num_turns=4,
            metrics={},
            extra_fields={**answer.extra_fields, "turn_scores": [], "tool_rewards": []},
        )
