#include <cuda_runtime.h>

#include "nt_xent_kernel.cuh"

namespace clae_fast {
namespace {

template <int kWidth, bool kFixedShift>
void launch(const Problem& problem) {
  const auto kernel = nt_xent_kernel<kWidth, kFixedShift>;
  const Plan& plan = problem.plan;
  check(kOp, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  plan.shared_bytes));
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = plan.blocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = static_cast<cudaStream_t>(problem.args.stream);
  config.attrs = &cooperative;
  config.numAttrs = 1;
  check(kOp, cudaLaunchKernelEx(&config, kernel, problem));
}

template <int kWidth>
void launch_for_temperature(const Problem& problem) {
  problem.args.temperature >= kFixedShiftTemperature ? launch<kWidth, true>(problem)
                                                     : launch<kWidth, false>(problem);
}

}  // namespace

int64_t nt_xent_cuda(const NtXentCudaArgs& args) {
  Problem problem;
  problem.args = args;
  problem.plan = make_plan(args.N, args.D);
  problem.workspace = make_workspace(args, problem.plan);
  if (!args.workspace) return problem.workspace.bytes;
  problem.n = int(2 * args.N);
  problem.scale2 = 1.f / (args.temperature * kLn2);
  problem.grad_scale = 1.f / (2 * args.N * args.temperature);
  switch (problem.plan.width) {
    case 64:
      launch_for_temperature<64>(problem);
      break;
    case 128:
      launch_for_temperature<128>(problem);
      break;
    default:
      launch_for_temperature<256>(problem);
  }
  return 0;
}

}  // namespace clae_fast
