# Torch's config file looks for its other half, Caffe2, in the system's folders before its own: with Torch_DIR
# naming one LibTorch and another installed in the system it would mix the two.
if(Torch_DIR)
  set(peft_torch_dir "${Torch_DIR}")
else()
  set(peft_torch_dir "$ENV{Torch_DIR}")
endif()
if(peft_torch_dir AND NOT Caffe2_DIR AND EXISTS "${peft_torch_dir}/../Caffe2/Caffe2Config.cmake")
  get_filename_component(Caffe2_DIR "${peft_torch_dir}/../Caffe2" ABSOLUTE)
  find_library(TORCH_LIBRARY torch PATHS "${peft_torch_dir}/../../../lib" NO_DEFAULT_PATH)
  find_library(c10_LIBRARY c10 PATHS "${peft_torch_dir}/../../../lib" NO_DEFAULT_PATH)
endif()
unset(peft_torch_dir)
