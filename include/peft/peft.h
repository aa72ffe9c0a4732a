// peft: parameter-efficient fine-tuning for LibTorch. This header only includes the others.
#pragma once

#include "peft/core/adapted.h"
#include "peft/core/adapter.h"
#include "peft/core/attention.h"
#include "peft/core/input.h"
#include "peft/methods/bias.h"
#include "peft/methods/lora.h"
#include "peft/methods/replace.h"
#include "peft/model/active.h"
#include "peft/model/add_adapter.h"
#include "peft/model/merge.h"
#include "peft/model/summary.h"
#include "peft/version.h"
