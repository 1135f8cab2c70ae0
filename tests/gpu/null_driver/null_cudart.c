/* A CUDA runtime whose device memory is host memory and whose kernels do nothing. Copies are made, and all is counted. */
#include <stdlib.h>
#include <string.h>
#include <cuda_runtime_api.h>

static struct { long launches, captures, replays, to_device, to_host; } counts;
static int capturing;

/* 0 launches, 1 captures, 2 replays, 3 copies to the device, 4 copies to the host */
long null_driver_count(int which) {
    long values[] = {counts.launches, counts.captures, counts.replays, counts.to_device, counts.to_host};
    return values[which];
}

/* NULL_DRIVER_SM: the architecture, 75 (T4) by default, 89 is an L4. */
static int architecture(void) {
    const char *given = getenv("NULL_DRIVER_SM");
    return given ? atoi(given) : 75;
}

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return 0; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return 0; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : 0; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *facts, int device) {
    memset(facts, 0, sizeof *facts);
    strcpy(facts->name, "null");
    facts->major = architecture() / 10;
    facts->minor = architecture() % 10;
    facts->multiProcessorCount = 40;
    facts->maxThreadsPerBlock = facts->maxThreadsPerMultiProcessor = 1024;
    facts->warpSize = 32;
    facts->sharedMemPerBlock = 48 << 10;
    facts->sharedMemPerBlockOptin = facts->sharedMemPerMultiprocessor = 64 << 10;
    facts->regsPerBlock = 65536;
    facts->totalGlobalMem = 16ul << 30;
    facts->l2CacheSize = 4 << 20;
    facts->maxGridSize[0] = 2147483647;
    facts->maxGridSize[1] = facts->maxGridSize[2] = 65535;
    return 0;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = architecture() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = architecture() % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = 40; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 64 << 10; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 1024;
    }
    return 0;
}

cudaError_t cudaMalloc(void **memory, size_t size) {
    *memory = aligned_alloc(256, (size + 511) / 256 * 256);
    return *memory ? 0 : cudaErrorMemoryAllocation;
}
cudaError_t cudaMallocFromPoolAsync(void **memory, size_t size, cudaMemPool_t pool, cudaStream_t stream) { return cudaMalloc(memory, size); }
cudaError_t cudaMallocHost(void **memory, size_t size) { return cudaMalloc(memory, size); }
cudaError_t cudaHostAlloc(void **memory, size_t size, unsigned flags) { return cudaMalloc(memory, size); }
cudaError_t cudaFree(void *memory) { free(memory); return 0; }
cudaError_t cudaFreeAsync(void *memory, cudaStream_t stream) { free(memory); return 0; }
cudaError_t cudaFreeHost(void *memory) { free(memory); return 0; }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) { *available = 15ul << 30; *total = 16ul << 30; return 0; }
cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const struct cudaMemPoolProps *facts) { *pool = malloc(64); return 0; }

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    counts.to_device += kind == cudaMemcpyHostToDevice;
    counts.to_host += kind == cudaMemcpyDeviceToHost;
    memmove(to, from, size);
    return 0;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) { return cudaMemcpy(to, from, size, kind); }
cudaError_t cudaMemset(void *memory, int value, size_t size) { memset(memory, value, size); return 0; }
cudaError_t cudaMemsetAsync(void *memory, int value, size_t size, cudaStream_t stream) { memset(memory, value, size); return 0; }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *facts, const void *memory) {
    memset(facts, 0, sizeof *facts);
    facts->type = cudaMemoryTypeDevice;
    facts->devicePointer = (void *)memory;
    return 0;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = malloc(64); return 0; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { *stream = malloc(64); return 0; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = malloc(64); return 0; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = malloc(64); return 0; }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) { *milliseconds = 0.01f; return 0; }

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) { capturing = 1; return 0; }
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    capturing = 0;
    counts.captures++;
    *graph = malloc(64);
    return 0;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return 0;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *instance, cudaGraph_t graph, unsigned long long flags) { *instance = malloc(64); return 0; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t instance, cudaStream_t stream) { counts.replays++; return 0; }

cudaError_t cudaLaunchKernel(const void *kernel, struct dim3 grid, struct dim3 block, void **arguments, size_t shared, cudaStream_t stream) { counts.launches++; return 0; }
cudaError_t __cudaLaunchKernel(void *kernel, struct dim3 grid, struct dim3 block, void **arguments, size_t shared, cudaStream_t stream) { counts.launches++; return 0; }
cudaError_t __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return 0; }
unsigned __cudaPushCallConfiguration(struct dim3 grid, struct dim3 block, size_t shared, void *stream) { return 0; }
cudaError_t __cudaPopCallConfiguration(struct dim3 *grid, struct dim3 *block, size_t *shared, void *stream) {
    struct dim3 one = {1, 1, 1};
    *grid = *block = one;
    *shared = 0;
    *(void **)stream = 0;
    return 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *facts, const void *function) {
    memset(facts, 0, sizeof *facts);
    facts->maxThreadsPerBlock = 1024;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int size, size_t shared, unsigned flags) { *blocks = 1; return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
    *function = 0;
    return cudaErrorSymbolNotFound;
}
