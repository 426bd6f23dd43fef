# Finds torch and defines
#   attn_mask_torch        what libattn_mask links with
#   attn_mask_torch_cuda   the same plus torch's CUDA libraries, where torch has them
#   ATTN_MASK_TORCH_VERSION, ATTN_MASK_TORCH_CUDA_VERSION (empty for a CPU build of torch),
#   ATTN_MASK_TORCH_FOUND_ROOT
#
# Not by find_package(Torch): a CUDA build of torch refuses to be found where there is no CUDA toolkit,
# and the CPU operators must build there all the same. Looked at in turn: ATTN_MASK_TORCH_ROOT, Torch_DIR,
# CMAKE_PREFIX_PATH (torch.utils.cmake_prefix_path, or an unpacked LibTorch), the torch of Python3, the
# torch beside an installed attn_mask package, ATTN_MASK_TORCH_BUILT_WITH.

if(NOT TARGET attn_mask_torch)
  set(ATTN_MASK_TORCH_ROOT "" CACHE PATH "The folder of torch: holds include/ and lib/")

  set(_roots "${ATTN_MASK_TORCH_ROOT}")
  if(Torch_DIR)
    list(APPEND _roots "${Torch_DIR}/../../..")
  endif()
  string(REPLACE ":" ";" _prefixes "$ENV{CMAKE_PREFIX_PATH}")
  foreach(_prefix IN LISTS CMAKE_PREFIX_PATH _prefixes)
    list(APPEND _roots "${_prefix}" "${_prefix}/../..")
  endforeach()
  if(NOT ATTN_MASK_TORCH_ROOT AND Python3_EXECUTABLE)
    # find_spec does not import torch, which would take seconds.
    execute_process(
      COMMAND "${Python3_EXECUTABLE}" -c
              "import importlib.util as u, os; s = u.find_spec('torch'); print(os.path.dirname(s.origin) if s else '')"
      OUTPUT_VARIABLE _python_torch OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    list(APPEND _roots "${_python_torch}")
  endif()
  # The installed Python package stands beside torch.
  list(APPEND _roots "${CMAKE_CURRENT_LIST_DIR}/../../../../torch" "${ATTN_MASK_TORCH_BUILT_WITH}")

  set(_found "")
  foreach(_root IN LISTS _roots)
    if(_root AND EXISTS "${_root}/include/ATen/ATen.h")
      get_filename_component(_found "${_root}" ABSOLUTE)
      break()
    endif()
  endforeach()
  if(NOT _found)
    message(FATAL_ERROR "attn_mask: no torch found. Install torch for the Python in use, or pass "
                        "-DATTN_MASK_TORCH_ROOT=<folder with include/ and lib/>. Looked in: ${_roots}")
  endif()

  set(_version "")
  set(_cuda "")
  if(EXISTS "${_found}/version.py") # a Python package
    file(STRINGS "${_found}/version.py" _lines REGEX "^(__version__|cuda)")
    foreach(_line IN LISTS _lines)
      if(_line MATCHES "^__version__ *= *'([^']+)'")
        set(_version "${CMAKE_MATCH_1}")
      elseif(_line MATCHES "^cuda[^=]*= *'([^']+)'")
        set(_cuda "${CMAKE_MATCH_1}")
      endif()
    endforeach()
  elseif(EXISTS "${_found}/build-version") # LibTorch
    file(STRINGS "${_found}/build-version" _version LIMIT_COUNT 1)
    if(_version MATCHES "cu([0-9][0-9])([0-9])")
      set(_cuda "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
    endif()
  endif()

  function(attn_mask_import_torch target)
    add_library(${target} INTERFACE IMPORTED GLOBAL)
    foreach(_name IN LISTS ARGN)
      # Not cached: the next call may be for another torch.
      find_library(_library ${_name} PATHS "${_found}/lib" NO_DEFAULT_PATH NO_CACHE REQUIRED)
      target_link_libraries(${target} INTERFACE "${_library}")
      unset(_library)
    endforeach()
    target_include_directories(
      ${target} SYSTEM INTERFACE "${_found}/include" "${_found}/include/torch/csrc/api/include")
    target_compile_features(${target} INTERFACE cxx_std_20) # ATen's headers since torch 2.15
    target_compile_definitions(${target} INTERFACE _GLIBCXX_USE_CXX11_ABI=1)
  endfunction()

  attn_mask_import_torch(attn_mask_torch torch torch_cpu c10)
  if(_cuda)
    attn_mask_import_torch(attn_mask_torch_cuda torch torch_cpu c10 torch_cuda c10_cuda)
  endif()
  set_target_properties(attn_mask_torch PROPERTIES ATTN_MASK_VERSION "${_version}" ATTN_MASK_ROOT "${_found}"
                                                   ATTN_MASK_CUDA_VERSION "${_cuda}")
endif()

# Called again, maybe in another folder of the same project, whose variables are others.
get_target_property(ATTN_MASK_TORCH_VERSION attn_mask_torch ATTN_MASK_VERSION)
get_target_property(ATTN_MASK_TORCH_CUDA_VERSION attn_mask_torch ATTN_MASK_CUDA_VERSION)
get_target_property(ATTN_MASK_TORCH_FOUND_ROOT attn_mask_torch ATTN_MASK_ROOT)
