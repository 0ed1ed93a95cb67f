using '../main.bicep'

// For the nightly job: H100 nodes, spot because no row is lost, zone-redundant storage, a year of logs.
param namePrefix = readEnvironmentVariable('TOKENMILL_PREFIX', 'tkm')
param environmentName = 'prod'
param workerSize = 'Standard_ND96isr_H100_v5'
param maxWorkers = 16
param spotWorkers = true
param maxDriverNodes = 4
param imageTag = readEnvironmentVariable('TOKENMILL_IMAGE_TAG', '0.1.0')
param storageSku = 'Standard_ZRS'
param undeleteDays = 30
param logRetentionDays = 365
param logDailyCapGb = 5
param batchServiceObjectId = readEnvironmentVariable('TOKENMILL_BATCH_SERVICE')
param operatorObjectId = readEnvironmentVariable('TOKENMILL_OPERATORS', '')
param sshPublicKey = readEnvironmentVariable('TOKENMILL_SSH_PUBLIC_KEY', '')
param tags = {
  costCenter: 'production'
}
