"""One store in a folder, opened twice at a time as by two processes; and a tenant whom nobody else can find."""

from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pqcodec.formats import PrefixStore

torch.manual_seed(0)
sizes = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
prompt, secret = torch.randint(3, 1000, (2, 1, 600))

with TemporaryDirectory() as folder, PrefixStore(folder) as one, PrefixStore(folder) as other:
    one.generate(model, prompt, max_new_tokens=1, wait=True)
    print("the other finds", other.get(model, prompt).length, "tokens")

    with PrefixStore(folder, tenant="a long random salt", tenant_max_bytes="1MB") as alice:
        alice.generate(model, secret, max_new_tokens=1, wait=True)
        print("alice finds", alice.get(model, secret).length)
        print("the other finds", other.get(model, secret).length, "of hers")
