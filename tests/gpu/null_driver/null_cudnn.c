/* The functions of cuDNN that reductions of our graphs ask for. */
#include <stdlib.h>

#define CREATE(name) int name(void **handle) { *handle = malloc(4096); return 0; }
#define NOTHING(name) int name() { return 0; }

CREATE(cudnnCreate)
CREATE(cudnnCreateReduceTensorDescriptor)
CREATE(cudnnCreateTensorDescriptor)
NOTHING(cudnnDestroy)
NOTHING(cudnnDestroyReduceTensorDescriptor)
NOTHING(cudnnDestroyTensorDescriptor)
NOTHING(cudnnReduceTensor)
NOTHING(cudnnSetReduceTensorDescriptor)
NOTHING(cudnnSetStream)
NOTHING(cudnnSetTensor4dDescriptor)
NOTHING(cudnnSetTensorNdDescriptor)
int cudnnGetReductionWorkspaceSize(void *handle, void *how, void *from, void *to, size_t *size) { *size = 1024; return 0; }
int cudnnGetReductionIndicesSize(void *handle, void *how, void *from, void *to, size_t *size) { *size = 1024; return 0; }
size_t cudnnGetVersion() { return 91300; }
const char *cudnnGetErrorString(int code) { return "null driver"; }
