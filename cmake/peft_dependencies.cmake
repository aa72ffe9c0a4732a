# Finds what the library needs, unless the parent project already has it.
if(NOT TARGET torch)
  include(${CMAKE_CURRENT_LIST_DIR}/peft_torch_dir.cmake)
  find_package(Torch 1.13 REQUIRED)
endif()
if(NOT TARGET fmt::fmt-header-only)
  find_package(fmt REQUIRED)
endif()
if(NOT TARGET nlohmann_json::nlohmann_json)
  find_package(nlohmann_json REQUIRED)
endif()

# Imported targets are visible in the folder that found them only; a project that adds this one as a
# sub-directory links them from above.
if(NOT PROJECT_IS_TOP_LEVEL)
  get_directory_property(peft_imported_targets IMPORTED_TARGETS)
  foreach(peft_imported_target IN LISTS peft_imported_targets)
    set_target_properties(${peft_imported_target} PROPERTIES IMPORTED_GLOBAL TRUE)
  endforeach()
endif()
