"""A prefix store: the second question about a document computes only what is new."""

from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pqcodec.formats import PrefixStore

torch.manual_seed(0)
sizes = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()  # of random weights; any model of transformers
document = torch.randint(3, 1000, (1, 600))
questions = torch.randint(3, 1000, (2, 20))

with TemporaryDirectory() as folder, PrefixStore(folder, max_bytes="1GB") as store:
    for question in questions:
        prompt = torch.cat([document, question[None]], -1)
        known = store.get(model, prompt).length  # only to be told; generate looks by itself
        answer = store.generate(model, prompt, max_new_tokens=5, do_sample=False)
        store.flush()  # saving goes on in the background
        print(f"prompt of {prompt.shape[1]} tokens: {known} found, {answer.shape[1] - prompt.shape[1]} generated")
