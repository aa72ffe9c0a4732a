# Warnings of this project's own programs. The library target carries none: a user's flags are the user's.
function(peft_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror)
endfunction()
