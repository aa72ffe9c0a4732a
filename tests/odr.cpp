// Linked into every test program: a second translation unit with the whole library finds a missing `inline`.
#include <peft/peft.h>

#include <string_view>

std::string_view version_seen_by_another_file() { return peft::version; }
