//! Work that blocks, off the threads that answer.

/// Does it on a thread for such work. Where the runtime ends before it began, so does whoever waits: this never returns then.
///
/// # Panics
/// As the work does.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => std::future::pending().await,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_that_ends_is_no_panic() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).max_blocking_threads(1).build().unwrap();
        let (began, begun) = std::sync::mpsc::channel();
        let (end, ends) = std::sync::mpsc::channel::<()>();
        // It holds the only thread, so that the next one never begins.
        runtime.spawn_blocking(move || {
            began.send(()).unwrap();
            let _ = ends.recv();
        });
        begun.recv().unwrap();
        let waits = runtime.spawn(blocking(|| 1));
        runtime.shutdown_timeout(std::time::Duration::from_millis(50));
        drop(end);
        let left = tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(waits);
        assert!(left.unwrap_err().is_cancelled());
    }

    #[tokio::test]
    #[should_panic(expected = "of the work")]
    async fn a_panic_is_the_callers() {
        blocking(|| panic!("of the work")).await;
    }
}
