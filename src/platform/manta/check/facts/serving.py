"""Names that Ray Serve, ray.serve.llm and vLLM know. Source: their source code, read by `ast`.

A unit test compares these with what is installed, so that an upgrade shows what is new.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SERVE_KEYS = {
    "ServeDeploySchema": _names(
        """
        proxy_location http_options grpc_options controller_options logging_config
        tracing_config applications target_capacity
        """
    ),
    "ServeApplicationSchema": _names(
        """
        name route_prefix import_path runtime_env host port deployments autoscaling_policy args
        logging_config external_scaler_enabled
        """
    ),
    "DeploymentSchema": _names(
        """
        name num_replicas max_ongoing_requests max_queued_requests backpressure_config
        user_config autoscaling_config graceful_shutdown_wait_loop_s
        graceful_shutdown_timeout_s health_check_period_s health_check_timeout_s
        ray_actor_options placement_group_bundles placement_group_strategy
        placement_group_bundle_label_selector max_replicas_per_node logging_config
        request_router_config gang_scheduling_config deployment_actors
        rolling_update_percentage max_surge_percent
        """
    ),
    "RayActorOptionsSchema": _names(
        """
        runtime_env num_cpus num_gpus memory resources accelerator_type label_selector
        fallback_strategy
        """
    ),
    "HTTPOptionsSchema": _names(
        """
        host port root_path request_timeout_s keep_alive_timeout_s ssl_keyfile ssl_certfile
        ssl_keyfile_password ssl_ca_certs
        """
    ),
    "gRPCOptionsSchema": _names(
        "port grpc_servicer_functions request_timeout_s enable_reflection"
    ),
    "LoggingConfig": _names(
        """
        encoding log_level logs_dir enable_access_log additional_log_standard_attrs
        """
    ),
    "TracingConfig": _names("enabled exporter_import_path sampling_ratio"),
    "AutoscalingConfig": _names(
        """
        min_replicas initial_replicas max_replicas target_ongoing_requests metrics_interval_s
        look_back_period_s smoothing_factor upscale_smoothing_factor downscale_smoothing_factor
        upscaling_factor downscaling_factor downscale_delay_s downscale_to_zero_delay_s
        upscale_delay_s aggregation_function policy
        """
    ),
    "AutoscalingPolicy": _names("policy_function policy_kwargs"),
    "RequestRouterConfig": _names(
        """
        request_router_class request_router_kwargs request_routing_stats_period_s
        request_routing_stats_timeout_s initial_backoff_s backoff_multiplier max_backoff_s
        """
    ),
    "GangSchedulingConfig": _names("gang_size gang_placement_strategy runtime_failure_policy"),
    "DeploymentActorConfig": _names("name actor_class init_args init_kwargs actor_options"),
    "BackpressureConfig": _names("status_code retry_after_s"),
    "ControllerOptions": _names("runtime_env"),
}
"""Model in ray/serve/schema.py or config.py → its keys."""

LLM_KEYS = {
    "LLMConfig": _names(
        """
        runtime_env model_loading_config llm_engine engine_kwargs accelerator_type
        accelerator_config placement_group_config lora_config deployment_config server_cls
        experimental_configs log_engine_metrics callback_config
        """
    ),
    "ModelLoadingConfig": _names("model_id model_source tokenizer_source"),
    "LoraConfig": _names(
        """
        dynamic_lora_loading_path max_num_adapters_per_replica download_timeout_s
        max_download_tries
        """
    ),
    "LLMServingArgs": _names("llm_configs ingress_cls_config ingress_deployment_config"),
    "IngressClsConfig": _names("ingress_cls ingress_extra_kwargs"),
}
"""Model of ray.serve.llm → its keys; an unknown one is refused when the app is built."""

VLLM_ENGINE_KEYS = _names(
    """
    additional_config aggregate_engine_logging all2all_backend allow_deprecated_quantization
    allowed_local_media_path allowed_media_domains async_scheduling attention_backend
    attention_config block_size code_revision collect_detailed_traces compilation_config
    config_format convert cp_kv_cache_interleave_size cpu_distributed_timeout_seconds
    cpu_offload_gb cpu_offload_params cudagraph_capture_sizes cudagraph_metrics
    data_parallel_address data_parallel_backend data_parallel_external_lb
    data_parallel_hybrid_lb data_parallel_multi_port_external_lb data_parallel_rank
    data_parallel_rpc_port data_parallel_size data_parallel_size_local data_parallel_start_rank
    dbo_decode_token_threshold dbo_prefill_token_threshold dcp_comm_backend
    dcp_kv_cache_interleave_size dcp_q_replicate decode_context_parallel_size default_mm_loras
    device_ids diffusion_config disable_cascade_attn disable_chunked_mm_input
    disable_custom_all_reduce disable_hybrid_kv_cache_manager disable_log_stats
    disable_nccl_for_dp_synchronization disable_sliding_window distributed_executor_backend
    distributed_timeout_seconds download_dir dtype ec_manager_config ec_transfer_config
    enable_batch_sharded_sampling enable_bf16x3_router_gemm enable_chunked_prefill
    enable_cumem_allocator enable_dbo enable_elastic_ep enable_ep_weight_filter enable_eplb
    enable_expert_parallel enable_fault_tolerance enable_flashinfer_autotune
    enable_layerwise_nvtx_tracing enable_log_requests enable_logging_iteration_details
    enable_lora enable_mamba_cache_stochastic_rounding enable_mfu_metrics
    enable_mixed_moe_lora_format enable_mm_embeds enable_mm_processor_stats
    enable_moe_shared_loras enable_prefix_caching enable_prompt_embeds
    enable_return_routed_experts enable_sleep_mode enable_tower_connector_lora
    enable_trace_replay enforce_eager eplb_config expert_placement_strategy
    fail_on_environ_validation fault_tolerance_config fully_sharded_loras gdn_prefill_backend
    generation_config gpu_memory_utilization hf_config_path hf_overrides hf_token
    ignore_patterns interleave_mm_strings io_processor_plugin ir_op_priority jit_monitor_mode
    jit_monitor_verbose kda_prefill_backend kernel_config kv_cache_dtype
    kv_cache_dtype_skip_layers kv_cache_memory_bytes kv_cache_metrics kv_cache_metrics_sample
    kv_events_config kv_offloading_backend kv_offloading_size kv_sharing_fast_prefill
    kv_transfer_config language_model_only limit_mm_per_prompt linear_backend load_format
    logits_processors logprobs_mode long_prefill_token_threshold lora_dtype lora_target_modules
    mamba_backend mamba_block_size mamba_cache_dtype mamba_cache_mode mamba_cache_philox_rounds
    mamba_config mamba_ssm_cache_dtype mamba_ssu_algorithm master_addr master_port
    max_cpu_loras max_cudagraph_capture_size max_logprobs max_lora_rank max_loras max_model_len
    max_num_batched_tokens max_num_queued_reqs max_num_queued_tokens max_num_scheduled_tokens
    max_num_seqs max_parallel_loading_workers media_io_kwargs mm_device_do_normalize
    mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path
    mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path mm_encoder_only
    mm_encoder_tp_mode mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb
    mm_processor_cache_type mm_processor_device mm_processor_kwargs
    mm_shm_cache_max_object_size_mb mm_tensor_ipc model model_class_overrides model_impl
    model_loader_extra_config model_weights moe_backend nnodes node_rank
    num_gpu_blocks_override numa_bind numa_bind_cpus numa_bind_nodes offload_backend
    offload_group_size offload_num_in_group offload_params offload_prefetch_step
    optimization_level otlp_traces_endpoint override_generation_config
    per_request_spec_decode_metrics performance_mode pipeline_parallel_size pooler_config
    prefill_context_parallel_size prefill_schedule_interval prefix_cache_retention_interval
    prefix_caching_hash_algo prefix_match_unit profiler_config pt_load_map_location
    quantization quantization_config ray_workers_use_nsight reasoning_config reasoning_parser
    reasoning_parser_plugin renderer_num_workers replayssm_buffer_len return_sampling_mask
    revision runner safetensors_load_strategy safetensors_prefetch_block_size
    safetensors_prefetch_num_threads scheduler_cls scheduler_reserve_full_isl scheduling_policy
    seed served_model_name show_hidden_metrics_for_version shutdown_timeout skip_mm_profiling
    skip_tokenizer_init spec_method spec_model spec_tokens specialize_active_lora
    speculative_config stream_interval structured_outputs_config tensor_parallel_size tokenizer
    tokenizer_mode tokenizer_revision tokens_only trust_remote_code ubatch_size use_fp64_gumbel
    use_replayssm use_tqdm_on_load video_pruning_method video_pruning_rate watermark
    weight_transfer_config worker_cls worker_extension_cls
    """
)
"""Engine arguments of vLLM (AsyncEngineArgs)."""

RUNTIME_ENV_KEYS = _names(
    """
    working_dir py_modules java_jars pip uv conda container image_uri env_vars py_executable
    worker_process_setup_hook excludes config nsight rocprof_sys _nsight _rocprof_sys
    """
)
"""Fields of Ray's runtime_env; Ray takes unknown ones with a warning only."""
