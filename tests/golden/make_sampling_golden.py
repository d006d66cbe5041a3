"""Writes `greedy.json` and `rmsprop.json` beside it: what transformers decodes and torch optimizes.

    python tests/golden/make_sampling_golden.py --smollm2 DIRECTORY

needs torch and transformers 5. The first file holds greedy answers of SmolLM2-135M-Instruct in f32; the second a
trajectory of `torch.optim.RMSprop` behind `clip_grad_norm_`.
"""

import argparse
import json
import pathlib

import torch
import transformers

HERE = pathlib.Path(__file__).parent
NEW_TOKENS = 64
PROMPTS = [
    "Hi!",
    "Name three colours.",
    "What is 7 times 8?",
    "Write one sentence about rain.",
    "Who wrote Hamlet?",
    "Translate 'good morning' into French.",
    "Give me a rhyme for 'light'.",
    "Is a tomato a fruit? Answer yes or no.",
    "List the planets of the solar system in order from the sun.",
    "Explain photosynthesis to a ten-year-old in two sentences.",
    "What is the capital of Japan, and how many people live there?",
    "Write a Python function that returns the larger of two numbers.",
    "Fix the grammar: 'She don't likes apples.'",
    "Continue the story: The lighthouse keeper had not slept for three nights when",
    "Summarise in five words: Bees carry pollen from flower to flower while they look for nectar.",
    "Which is heavier, a kilogram of feathers or a kilogram of steel? Say why.",
    "Turn this into a polite request: Shut the window.",
    "What should I pack for a weekend hike in the mountains in October?",
    "Complete the series: 2, 4, 8, 16,",
    "Write a haiku about an empty train station.",
    "How do I boil an egg so that the yolk stays soft?",
    "Give one argument for and one against school uniforms.",
    "Classify the mood of this review as good or bad: 'The soup was cold and the waiter forgot us twice.'",
    "What does the word 'ephemeral' mean? Use it in a sentence.",
    "Extract the date: The meeting was moved from Monday the 3rd to Thursday the 6th of May.",
    "Write a short e-mail to my landlord, Mrs Alvarez, saying that the kitchen tap has been dripping since Tuesday, "
    "that I have tried to tighten it, and that I would like her to send somebody on Friday afternoon when I am at "
    "home.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take?",
    "Read the text and answer the question. Text: The old library on Mill Street closed in 1987, after the river had "
    "flooded its cellar for the third time. Most of its books went to the school, but the maps were kept by the town "
    "hall, where they still hang in the stairwell. Question: Where are the maps now?",
    "Which of these is not an animal: dog, trout, oak, sparrow?",
    "Describe a lemon without using the word 'yellow'.",
    "Convert 5 kilometres to miles.",
    "Sort these words alphabetically: pear, apple, quince, banana, fig, cherry, grape, lemon, mango, date, plum.",
]


def make_greedy(directory: str, batch_size: int = 16) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    eos = model.generation_config.eos_token_id
    stop_ids = eos if isinstance(eos, list) else [eos]
    prompts, responses, margins = [], [], []
    for start in range(0, len(PROMPTS), batch_size):
        chats = [[{"role": "user", "content": text}] for text in PROMPTS[start : start + batch_size]]
        asked = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(
            **asked, do_sample=False, max_new_tokens=NEW_TOKENS, output_scores=True, return_dict_in_generate=True
        )
        best_RB2 = torch.stack([scores.topk(2).values for scores in out.scores])
        for i, (tokens, mask) in enumerate(zip(asked["input_ids"], asked["attention_mask"], strict=True)):
            prompts.append(tokens[mask.bool()].tolist())
            response = out.sequences[i, len(tokens) :].tolist()
            length = next((j + 1 for j, token in enumerate(response) if token in stop_ids), len(response))
            responses.append(response[:length])
            margins += (best_RB2[:length, i, 0] - best_RB2[:length, i, 1]).tolist()
    # Another library rounds differently: the answers are comparable only while no step is nearly a tie.
    print(f"smallest distance between the two best logits of a step: {min(margins):.2e}")
    write(
        "greedy.json",
        {"new_tokens": NEW_TOKENS, "stop_ids": stop_ids, "prompts": prompts, "responses": responses},
    )


def make_rmsprop(steps: int = 8, learning_rate: float = 0.01, clip_norm: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5,), (2, 3))]
    optimizer = torch.optim.RMSprop(params, lr=learning_rate, alpha=0.99, eps=1e-8)
    golden = {"learning_rate": learning_rate, "clip_norm": clip_norm, "start": as_lists(params)}
    golden |= {"grads": [], "norms": [], "params": []}
    for step in range(steps):
        for param in params:
            # Norms on both sides of the clip, and one gradient element so small that where eps stands would show.
            param.grad = torch.randn(param.shape, generator=generator) * (2.0 if step % 2 else 0.1)
        params[0].grad[0] = 1e-7
        golden["grads"].append(as_lists([param.grad for param in params]))
        golden["norms"].append(float(torch.nn.utils.clip_grad_norm_(params, clip_norm)))
        optimizer.step()
        golden["params"].append(as_lists(params))
    write("rmsprop.json", golden)


def as_lists(tensors: list[torch.Tensor]) -> list[list]:
    return [tensor.detach().tolist() for tensor in tensors]


def write(name: str, golden: dict) -> None:
    (HERE / name).write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", required=True, help="a Hugging Face directory of SmolLM2-135M-Instruct")
    make_greedy(parser.parse_args().smollm2)
    make_rmsprop()
