// expects: needs a module holder with a forward
#include <peft/core/adapted.h>

struct NoForwardImpl : torch::nn::Module {};
TORCH_MODULE(NoForward);

int main() { peft::Adapted<NoForward> adapted{NoForward()}; }
