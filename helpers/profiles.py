"""The named profiles and the recipes: what each changes of the Config's defaults."""

from typing import Any

ATTENTION_TARGETS = ("q_proj", "v_proj")
ALL_LINEAR_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What Phi-3 and Phi-4 have in place of three of them, and of two: one matrix.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

# Three ways to train, on any profile's model, data and device. What a recipe does not name stays as
# in the profile: `recommended` leaves it the learning rate, which falls with the width of a model
# (3e-3 at SmolLM2's 576, 2e-4 at Llama-2-7B's 4096), and the batch, which follows the memory.
ARTICLE: dict[str, Any] = {
    "target_modules": ATTENTION_TARGETS,
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "completion_only_loss": False,
    "use_nested_quant": False,
    "learning_rate": 2e-4,
    "scheduler_type": "cosine",
    "per_device_train_batch_size": 4,
    "grad_acc_steps": 1,
    "max_grad_norm": 0.3,
    "weight_decay": 0.001,
    "group_by_length": True,
    "packing": False,
    "fast_path": False,
}
RECIPES: dict[str, dict[str, Any]] = {
    "article": ARTICLE,
    # Dettmers et al., arXiv 2305.14314, appendix B, for 7B. 4 x 4 rows hold the memory of 4.
    "qlora_paper": {
        **ARTICLE,
        "target_modules": ALL_LINEAR_TARGETS,
        "completion_only_loss": True,
        "use_nested_quant": True,
        "scheduler_type": "constant",
        "grad_acc_steps": 4,
        "weight_decay": 0.0,
    },
    "recommended": {
        "target_modules": ALL_LINEAR_TARGETS,
        "lora_r": 64,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "completion_only_loss": True,
        "use_nested_quant": True,
        "scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
    },
}

DEMO: dict[str, Any] = {
    **RECIPES["recommended"],
    "model_name": "smollm2-135m",
    "data_source": "sample",
    "device_map": {"": "cpu"},
    "bnb_4bit_compute_dtype": "auto",
    "min_answer_score": 1,
    # Four bits cost these two kinds of layers most, in answers (notebook 03).
    "keep_in_16bit": ("v_proj", "down_proj"),
    # The short answers, one function each: what a model of this size can learn in 20 steps.
    "max_train_length": 200,
    "max_steps": 20,
    "grad_acc_steps": 2,
    "learning_rate": 3e-3,
    "optim": "adamw_torch_fused",
    "activation_checkpointing": False,
    "merge_into": "auto",
    "gguf_types": ("f16", "q8_0"),
    "max_length": 400,
    "save_steps": 10,
    "eval_steps": 10,
    "log_steps": 2,
    "comparison_rows": 12,
    "max_new_tokens": 200,
    "generation_batch_size": 80,
    "evaluation_problems": (40, 20, 8, 4),
    "new_model_name": "SmolLM2-135M-minipython-instruct",
    "hf_hub_model_name": "SmolLM2-135M-minipython-instruct",
}

PROFILES: dict[str, dict[str, Any]] = {
    "article": {},
    "demo": DEMO,
    "smoke": {
        **DEMO,
        "max_train_length": None,
        "max_train_rows": 16,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "grad_acc_steps": 1,
        "save_steps": 1,
        "eval_steps": 1,
        "log_steps": 1,
        "comparison_rows": 2,
        "comparison_problems": 2,
        "max_new_tokens": 12,
        "evaluation_problems": (2, 1, 1, 1),
    },
    "colab_t4": {
        "model_name": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        "new_model_name": "TinyLlama-1.1B-minipython-instruct",
        "hf_hub_model_name": "TinyLlama-1.1B-minipython-instruct",
        "use_nested_quant": True,
        "target_modules": ALL_LINEAR_TARGETS,
        "fp16": True,
        "completion_only_loss": True,
        "merge_into": "auto",
        "optim": "paged_adamw_8bit",
        "max_grad_norm": 1.0,
    },
    "llama2_7b": {
        "use_nested_quant": True,
        "target_modules": ALL_LINEAR_TARGETS,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bf16": True,
        "completion_only_loss": True,
        "merge_into": "auto",
        "optim": "adamw_torch_fused",
        "scheduler_type": "constant_with_warmup",
        "lora_dropout": 0.0,
        "packing": True,
        "fast_path": True,
        "per_device_train_batch_size": 8,
        "grad_acc_steps": 2,
    },
}
