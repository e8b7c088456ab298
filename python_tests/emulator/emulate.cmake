# libsmpq_emulated.so: the ops' checks and the CUDA kernels, on cuda_emulator.h, under AddressSanitizer and UBSan. Its ops
# are torch.ops.smpq_emulated.*, for CPU tensors. Included by CMakeLists.txt with -DSMPQ_EMULATE=ON; never installed.
set_source_files_properties(${cuda_sources} PROPERTIES LANGUAGE CXX)
add_library(smpq_emulated SHARED ${glue_sources} ${cuda_sources})
target_compile_definitions(smpq_emulated PRIVATE SMPQ_EMULATE)
target_include_directories(smpq_emulated PRIVATE "${CMAKE_CURRENT_LIST_DIR}")
set(sanitizers -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer)
# -x c++: g++ does not know the suffix .cu. Its pragmas (unroll) are nvcc's.
target_compile_options(smpq_emulated PRIVATE -x c++ -O1 -g1 ${warnings} -Wno-unknown-pragmas ${arithmetic} ${sanitizers})
target_link_options(smpq_emulated PRIVATE ${sanitizers})
target_link_libraries(smpq_emulated PRIVATE torch_abi)

add_executable(faults "${CMAKE_CURRENT_LIST_DIR}/faults.cu")
set_source_files_properties("${CMAKE_CURRENT_LIST_DIR}/faults.cu" PROPERTIES LANGUAGE CXX)
target_include_directories(faults PRIVATE "${CMAKE_CURRENT_LIST_DIR}")
target_compile_options(faults PRIVATE -x c++ -O1 -g1 ${warnings} -Wno-unknown-pragmas ${sanitizers})
target_link_options(faults PRIVATE ${sanitizers})
